-- Claim an idempotency key, in the home slot, for the request that is about to be accepted in its model's slot.
-- Begins with a write that is refused when the server is out of memory, unless the key is claimed already.
-- KEYS: the claim. ARGV: P, the claim's name, model, rid, hash of the body, milliseconds until the first look of the sweep
-- -> the claim that holds: {model, rid, hash}. It is the caller's if the rid is its own, also when this is repeated
local key = P .. ARGV[2]
local model, rid, hash = string.match(redis.call('GET', key) or '', '^(%S+) (%S+) (%S+)$')
if model then return {model, rid, hash} end
redis.call('SET', key, ARGV[3] .. ' ' .. ARGV[4] .. ' ' .. ARGV[5])
redis.call('ZADD', P .. 'sweep:' .. ARGV[3], milliseconds() + tonumber(ARGV[6]), ARGV[2])
return {ARGV[3], ARGV[4], ARGV[5]}
