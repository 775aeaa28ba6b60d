"""Reading: files and their formats, datasets of the hub, and the steps that put their documents down."""
