"""Is the folder still what was exported?

    verify.py     files, sources and signature against the manifest
    sources.py    base and adapters, found again
    signature.py  OpenSSF model signing

Imports adapters, artifact, base, errors, named, own_hash, reading, sentence.
"""
