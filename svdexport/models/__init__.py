"""Hugging Face models: loading, their structure, calibration, and the low-rank modules."""
