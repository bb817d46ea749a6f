"""The HTTP interface: connections, the gate, authentication, the routes, and the JSON of jobs and
APIs."""
