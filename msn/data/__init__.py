"""From files to views: sources of images, their order, decoding, and the views of each."""
