"""Files that calibrations write and methods read, one format a module."""
