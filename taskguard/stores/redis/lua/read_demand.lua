-- The sums of some windows, one after the other.
-- ARGV: now ms (not used), the first window's beginning ms, window ms, how many.
-- RETURNS {of each window that is there: its beginning ms, {field, sum, ...}}.
local found = {}
for i = 0, ARGV[4] - 1 do
  local at = string.format('%.0f', ARGV[2] + i * ARGV[3])
  local flat = redis.call('HGETALL', base .. ':demand:' .. at)
  if flat[1] then
    found[#found + 1] = at
    found[#found + 1] = flat
  end
end
return found
