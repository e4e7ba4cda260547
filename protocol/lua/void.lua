-- See to it that a rid that was claimed and never accepted is never accepted later, so that its claim can be freed.
-- KEYS: live. ARGV: P, rid, how long the mark stays in milliseconds
-- -> -1 void, else there is such a request: the server's time at which its record goes, 0 if it has not ended
allow_when_full()
local record = P .. 'r:' .. ARGV[2]
if redis.call('EXISTS', record) == 1 then
  local stay = redis.call('PTTL', record)
  return stay < 0 and 0 or milliseconds() + stay
end
redis.call('SET', P .. 'void:' .. ARGV[2], '1', 'PX', ARGV[3])
return -1
