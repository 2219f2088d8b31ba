"""What tests share: small models, oracles, faults. No tests."""
