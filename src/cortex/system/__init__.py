"""What the operating system gives: the account of jobs, background work, and the removal of folders."""
