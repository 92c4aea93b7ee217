"""Files that calibrations write and methods read. Each module has one format."""
