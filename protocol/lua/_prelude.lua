-- Shared by every script. ARGV[1] is always the key prefix of the model; KEYS[1] only names the cluster slot.
-- The loader sets PUBLISH and NUMSUB in front of this (PUBLISH / NUMSUB, sharded in a cluster).
local P = ARGV[1]

-- Server TIME in milliseconds.
local function milliseconds()
  local t = redis.call('TIME')
  return string.format('%.0f', tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000))
end

-- The first write of a script decides whether it may run when the server is out of memory: this one may.
local function allow_when_full()
  redis.call('HDEL', P .. 'live', '')
end

local function is_leader(epoch)
  return redis.call('HGET', P .. 'leader', 'epoch') == epoch
end

local function is_worker(wid, gen)
  return redis.call('HGET', P .. 'w:' .. wid, 'gen') == gen
end

local function fenced(cause)
  return redis.error_reply('FENCED ' .. cause)
end

-- Note tokens that a tenant's bucket in the home slot is to be charged with (a negative number gives back): the leader
-- collects them. Only for requests that hold a reservation there (`charged` of the record).
local function owe(tenant, tokens)
  if tokens ~= 0 then redis.call('HINCRBY', P .. 'owed', tenant, tokens) end
end

-- Note tokens that are to be paid. `what`: in (of a prompt) or out. Of the same requests.
local function owe_money(what, tenant, tokens)
  if tokens ~= 0 then redis.call('HINCRBY', P .. 'owed', what .. ':' .. tenant, tokens) end
end
