"""Deploys: from an uploaded project to a version that takes jobs."""
