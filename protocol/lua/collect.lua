-- What tenants owe in the home slot for requests of this one: reservations that have ended, and tokens. It is handed out in
-- numbered batches; one stays until the leader says that the home slot has it (settle.lua).
-- KEYS: leader. ARGV: P, epoch, number of the batch that was settled last (0: none)
-- -> {number, field, value, ...} | {} where nothing is owed
allow_when_full()
if not is_leader(ARGV[2]) then return fenced('epoch') end
local owed, owing = P .. 'owed', P .. 'owing'
local number = redis.call('HGET', P .. 'leader', 'owing')
if number == ARGV[3] then redis.call('DEL', owing) end
if redis.call('EXISTS', owing) == 0 then
  if redis.call('EXISTS', owed) == 0 then return {} end
  redis.call('RENAME', owed, owing)
  -- by the clock, so that numbers go on rising should this slot lose its data
  number = string.format('%.0f', math.max(tonumber(milliseconds()), tonumber(number or 0) + 1))
  redis.call('HSET', P .. 'leader', 'owing', number)
end
local batch = redis.call('HGETALL', owing)
table.insert(batch, 1, number)
return batch
