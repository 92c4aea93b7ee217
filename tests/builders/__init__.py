"""What several tests build: plans, patches, files of calibrations, tables of ops."""
