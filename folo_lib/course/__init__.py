"""What serves the pages and not the engine: exercises, widgets, figures that pages share."""
