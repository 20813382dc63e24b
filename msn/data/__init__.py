"""From files to views: sources of images, their order, decoding, and twelve views of each."""
