"""Jobs in progress: they wait, start, are watched and end here."""
