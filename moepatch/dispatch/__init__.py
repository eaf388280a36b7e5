"""Moving tokens between ranks: each module is one way to do it behind the contract of `base`."""
