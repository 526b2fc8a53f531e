"""A start for small models: supervised fine-tuning on scripted episodes until they speak the format and read advice."""
