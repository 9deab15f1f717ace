"""The pipeline: the stages of a run, which hand over files, and the tools around it."""
