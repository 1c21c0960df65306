"""The wire: `.proto` files and the stubs generated from them (`make protos`)."""
