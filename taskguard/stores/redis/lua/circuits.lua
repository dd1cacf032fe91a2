-- All circuits that are remembered.
-- KEYS[1] the partition.
-- ARGV: now us.
-- RETURNS of each: name, state and numbers, who, why.
local index, views = base .. 'circuits', {}
for _, id in ipairs(call('ZRANGE', index, 0, -1)) do
  local packed = call('GET', base .. 'circuit:' .. id)
  if packed then
    views[#views + 1] = id
    views[#views + 1], views[#views + 2], views[#views + 3] = circuit_view(load_circuit(packed))
  else
    call('ZREM', index, id)
  end
end
return views
