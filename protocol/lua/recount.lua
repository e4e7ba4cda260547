-- Make the sets of running requests true: members that have ended leave, unfinished requests that are missing enter (an
-- older version of a service ended or admitted them).
-- KEYS: leader. ARGV: P, epoch, then rid, tenant of unfinished requests -> members that were put right
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
local live, changed = P .. 'live', 0
for _, tenant in ipairs(redis.call('SMEMBERS', P .. 'tenants')) do
  for _, rid in ipairs(redis.call('SMEMBERS', P .. 'run:' .. tenant)) do
    if redis.call('HEXISTS', live, rid) == 0 then
      redis.call('SREM', P .. 'run:' .. tenant, rid)
      changed = changed + 1
    end
  end
  if redis.call('EXISTS', P .. 'run:' .. tenant) == 0 then redis.call('SREM', P .. 'tenants', tenant) end
end
for i = 3, #ARGV, 2 do
  if redis.call('HEXISTS', live, ARGV[i]) == 1 then
    changed = changed + redis.call('SADD', P .. 'run:' .. ARGV[i + 1], ARGV[i])
    redis.call('SADD', P .. 'tenants', ARGV[i + 1])
  end
end
return changed
