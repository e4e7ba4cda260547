-- Replace `depth` as a whole (so that idle tenants leave it). KEYS: leader. ARGV: P, epoch, field, value, ...
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
redis.call('DEL', P .. 'depth')
if #ARGV > 2 then redis.call('HSET', P .. 'depth', unpack(ARGV, 3)) end
return 1
