-- Have claims by these task ids dropped for a while. The value is the instant it ends; the expiry only sweeps.
-- ARGV: now ms, retention ms, task ids.
-- RETURNS nothing.
for i = 3, #ARGV do
  redis.call('SET', name('revoked', ARGV[i]), string.format('%.0f', now + ARGV[2]), 'PX', ARGV[2] + 3600000)
end
