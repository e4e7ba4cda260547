-- See to it that a rid that was claimed and never accepted is never accepted later, so that its claim can be freed.
-- KEYS: live. ARGV: P, rid, how long the mark stays in milliseconds -> 1 void, 0 there is such a request
allow_when_full()
if redis.call('EXISTS', P .. 'r:' .. ARGV[2]) == 1 then return 0 end
redis.call('SET', P .. 'void:' .. ARGV[2], '1', 'PX', ARGV[3])
return 1
