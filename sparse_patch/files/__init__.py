"""Files: how they are read, with limits, and written, all or nothing."""
