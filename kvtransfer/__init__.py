"""The hand-off: how the KV cache of a prompt passes from a prefill node to a decode node.

`protocol` decides (pure tables), `layout` and `manifest` say what passes, `link` moves bytes,
`sender` and `receiver` are the shells around them on either side.
"""
