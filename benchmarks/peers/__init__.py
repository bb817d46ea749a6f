"""The peers: other systems that run jobs, each set up as its documentation says, behind an endpoint
for the same client. They run in their own environment: `make bench-peers`.
"""
