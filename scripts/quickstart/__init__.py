"""The quickstart: its data set and its report. scripts/quickstart.sh runs all of it."""
