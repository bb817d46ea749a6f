"""The peers: other systems that take jobs, each as its own documentation sets it up, and behind an
endpoint that the same client asks. They run in an environment of their own: `make bench-peers`.
"""
