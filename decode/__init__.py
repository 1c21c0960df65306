"""The decode node: takes a prompt's KV over and writes the answer, many requests in one step."""
