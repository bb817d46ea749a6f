"""The HTTP interface: the wire, the gate in front of the routes, the routes, and how jobs and APIs are shown."""
