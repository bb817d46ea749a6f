"""Operating system: the account of jobs, background work, removal of folders, kinds of errors."""
