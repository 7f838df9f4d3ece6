"""What only the course needs: the first run and its report, the source viewer, plots, widgets, notebook tools."""
