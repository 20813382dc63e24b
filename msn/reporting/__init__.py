"""What people look at: pictures of a run, and the page that explains it."""
