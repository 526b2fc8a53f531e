"""Its place puts the helpers of this folder, experience_builders and extractor_script, within reach of the folders below."""
