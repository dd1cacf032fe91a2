-- Give slots back.
-- KEYS[1] the partition.
-- ARGV: now us, then of each: name, holder.
-- RETURNS how many were still their holders'.
local returned = 0
for i = 2, #ARGV, 2 do
  if give_back(bulkhead(ARGV[i]), ARGV[i + 1]) then returned = returned + 1 end
end
return returned
