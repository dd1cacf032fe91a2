-- An adaptive limit and its changes.
-- KEYS[1] the partition.
-- ARGV: now us, name.
-- RETURNS {limit, changes: "us before after why", newest first}, nil where none was set.
local limit = call('GET', base .. 'adaptive:' .. ARGV[2])
return limit and {limit, call('LRANGE', base .. 'adapted:' .. ARGV[2], 0, -1)}
