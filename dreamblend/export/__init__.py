"""Snapshots are taken away: as files and folders that other tools read.

what.py            what is exported: a snapshot, or two merged
low_rank.py        the weights of LoRAs: mixed, reduced, extracted
diffusers_lora.py, kohya_lora.py, pipeline.py, single_file.py, hub.py    a form each
"""
