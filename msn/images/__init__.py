"""One image from its file to pixels: which kinds, how deep, decoded once."""
