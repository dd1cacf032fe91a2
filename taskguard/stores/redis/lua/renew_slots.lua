-- Prolong the leases of slots.
-- KEYS[1] the partition.
-- ARGV: now us, lease us, then of each: name, holder.
-- RETURNS 1 for each whose holder has it, 0 for each whose holder has lost it.
local renewed = {}
for i = 3, #ARGV, 2 do
  local house = bulkhead(ARGV[i])
  local held = lease_of(house, ARGV[i + 1])
  if held then take(house, ARGV[i + 1], tonumber(ARGV[2])) end
  renewed[#renewed + 1] = held and 1 or 0
end
return renewed
