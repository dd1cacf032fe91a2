-- Let a unique name go if this task holds it.
-- ARGV: now ms, name, task id.
-- RETURNS 1, or 0 when another task or none holds it.
if unique_holder(ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('DEL', name('unique', ARGV[2]))
return 1
