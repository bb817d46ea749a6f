"""Several operators on one database: the leader, its peers, and what they forward to it."""
