-- A booking will not be used: who books next may have its slot.
-- KEYS[1] the partition.
-- ARGV: now us, name, slot us.
-- RETURNS 1 where the slot was given back to a line, else 0.
local given = 0
for _, kind in ipairs({'line:', 'queue:'}) do
  local key = base .. kind .. ARGV[2]
  local after = unbook(numbers(call('GET', key)), tonumber(ARGV[3]))
  if after then
    keep_line(key, after)
    given = 1
  end
end
return given
