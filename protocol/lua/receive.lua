-- In the first shard: put a push of a shard that drains into the inbox. Those of a shard come in the order of their ids in
-- its `moving`, so one that is repeated, or comes late, is known by its id.
-- KEYS: jobs. ARGV: P, number of the shard, id in `moving`, id that it had in the shard's inbox, payload
-- -> 1, or 0: received before
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local last = redis.call('HGET', P .. 'received', ARGV[2])
if last then
  local ms, seq = parts(ARGV[3])
  local last_ms, last_seq = parts(last)
  if ms < last_ms or (ms == last_ms and seq <= last_seq) then return 0 end
end
redis.call('HSET', P .. 'received', ARGV[2], ARGV[3])
redis.call('XADD', P .. 'jobs', '*', 'job', ARGV[5], 'from', ARGV[2] .. '.' .. ARGV[4])
return 1
