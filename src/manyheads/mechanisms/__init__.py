"""One paper, one file. Folders are the taxonomy; everything in them that is registered is found by itself."""
