"""What a person looks at: pictures of a run, and the page that explains it."""
