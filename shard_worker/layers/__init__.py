"""The parts that model families are made of. All collectives of a model live here."""
