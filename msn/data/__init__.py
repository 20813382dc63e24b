"""From files to views: sources of images, the order they come in, decoding, and twelve views of each."""
