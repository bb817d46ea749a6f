"""The routes of an operator, one module for each kind of resource."""
