"""Token stores to and from the formats of other trainers: Megatron's .bin and .idx, MosaicML's MDS.
Not here: texts (``dataio.ingest`` reads those), and any of those trainers' own code.
Start with ``incoming.py``: what tokens from elsewhere must be before they are a store."""
