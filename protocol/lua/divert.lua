-- Take a push out of the inbox of a shard that drains, to be moved to the first shard.
-- KEYS: leader. ARGV: P, epoch, entry id -> 1, or 0: it is gone
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
local entry = redis.call('XRANGE', P .. 'jobs', ARGV[3], ARGV[3])[1]
if not entry then return 0 end
redis.call('XACK', P .. 'jobs', 'scheduler', ARGV[3])
redis.call('XDEL', P .. 'jobs', ARGV[3])
redis.call('XADD', P .. 'moving', '*', 'from', ARGV[3], unpack(entry[2]))
return 1
