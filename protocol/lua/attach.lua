-- Add a reply channel to a request; effective with the next commit.
-- KEYS: live. ARGV: P, rid, tenant, channel -> all fields of the request | 'none' | 'full'
local rid, tenant, channel = ARGV[2], ARGV[3], ARGV[4]
local record = P .. 'r:' .. rid
allow_when_full()
if redis.call('HGET', record, 'tenant') ~= tenant then return 'none' end
if not add_channel(rid, channel) then return 'full' end
redis.call('HINCRBY', record, 'attached', 1)
if redis.call('HEXISTS', P .. 'live', rid) == 1 then redis.call('XADD', P .. 'events', '*', 'k', 'a', 'r', rid) end
return redis.call('HGETALL', record)
